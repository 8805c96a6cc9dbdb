"""One model replica: everything needed to run it alone, in process, without Ray."""
