"""Published networks whose outputs the metrics compare, one file each; users name the files of their weights."""
