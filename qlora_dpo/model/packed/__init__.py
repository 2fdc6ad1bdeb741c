"""What runs within a packed row: attention and recurrent layers in which every token sees its own sequence only."""
