"""Shared code of the notebooks: the runtime, ensembles to pick from, live plots of training, pages, downloads."""
