"""Quality: losses and scores of answers, by budget, method, and choice of options."""
