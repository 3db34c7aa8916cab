"""Files -> samples: data sets, augmentation, loaders. Import from the modules."""
