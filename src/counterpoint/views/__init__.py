"""Views: a modality in, changed copies of it out. `views.images` augments batches of pictures."""
