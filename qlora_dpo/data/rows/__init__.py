"""Rows as people have them: whatever trainer, data set or template wrote them, brought into the known formats."""
