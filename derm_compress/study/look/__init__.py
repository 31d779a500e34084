"""`look`: what would be read of a folder of photographs, before anything runs. No torch."""
