"""Make views, changed copies of the items of a modality. `views.images` augments batches of pictures."""
