"""The global dispatcher: the whole policy is in pure modules, the Ray actor only carries it."""
