"""The `edgellm` command, one module a verb."""
