"""What training and decoding cost, before anything runs."""
