"""Sandboxes that outlive the program that started them: one process per user holds them, others talk to it.

`client.Supervisor` is what a program uses, `server.Server` that process; the command line makes it. Nothing is imported
here: who only talks to the supervisor does not load it.
"""
