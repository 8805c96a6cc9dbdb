"""Moving a request from one instance to another while it runs.

``protocol`` holds the pure state machines and their vocabulary, ``transports`` the ways in
which KV blocks travel. Ownership is decided by the request's home
(``cluster/gateway/home.py``), never between the two instances.
"""
