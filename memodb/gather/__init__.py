"""The gather.

N scattered records become one contiguous tensor, by mapping their pages side by side, or by a warm copy.
"""
