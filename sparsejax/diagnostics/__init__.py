"""What attention does, as numbers: where its mass lies, and which blocks are chosen."""
