"""Features to clusters: k-means, its report, and one data folder per cluster."""
