"""The HTTP front end: the home of the requests that it accepted."""
