"""What a batch is: data sets, image store, sampling plan, augmentation."""
