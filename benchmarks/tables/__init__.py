"""Pages of tables and plots, made from results/*.json."""
