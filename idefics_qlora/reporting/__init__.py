"""What a run leaves to look at: a page, made of the files in its folder; knows no model."""
