"""One tier as one process: the roles of a recipe on different machines, and all of them rehearsed on one."""
