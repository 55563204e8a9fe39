"""What the notebooks share: the runtime, ensembles to pick from, live plots of training, pages, downloads."""
