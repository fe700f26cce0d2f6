"""The command line. Thin: parse, one library call, print."""
