"""What a model will take, told before anything is fetched, exported or built."""
