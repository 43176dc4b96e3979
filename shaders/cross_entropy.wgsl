// cross_entropy
