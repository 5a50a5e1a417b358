/* The guest's only network: a dummy interface whose packets go nowhere, and rules that redirect them to the agent. */
#ifndef TASKVM_NETLINK_H
#define TASKVM_NETLINK_H

/* Bring up lo and eth0, and redirect TCP and DNS to EGRESS_PORT. Says on the console what failed; the guest then has no network. */
void network_init(void);

#endif
