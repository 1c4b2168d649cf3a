"""What a result is: distances, CMC and mAP, re-ranking. Usable alone on any features."""
