"""Many replicas: dispatcher, gateways, launching and configuration."""
