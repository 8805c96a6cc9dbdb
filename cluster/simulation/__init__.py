"""The simulator: the real dispatcher and schedulers on a virtual clock, with modelled devices."""
