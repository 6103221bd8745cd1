"""Inputs by the thousand, made from valid ones: success or a LuthierError, in bounded time and memory."""
