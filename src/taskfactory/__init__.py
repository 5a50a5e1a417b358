"""taskfactory: runs the tasks of coding agents, with the agents' tools acting inside a taskvm sandbox."""
