"""Logs and data sets of other programs as task lines: a reader a format, and what they share.

files (bytes → values) and chat, definitions (one spelling of messages and of tools) → record (a conversation and its
decisions) → a module for each format → registry → lines (records → task lines, with a reason for all that is left out).
"""
