"""What `preceptor select` is made of: the pool, its measures, quality, diversity, the choice and its reasons."""
