"""Speed: seconds, memory and evaluations of the engine, of merging and of loading."""
