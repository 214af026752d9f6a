"""The experiments of arXiv 2402.17759 through the service: what is run, what is found, and the page that shows it."""
