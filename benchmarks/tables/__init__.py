"""Tables and plots of pages/*.md, made from results/*.json."""
