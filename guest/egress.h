/* The way out: every TCP connection and DNS query of the guest's programs, as streams and messages of the net port. */
#ifndef TASKVM_EGRESS_H
#define TASKVM_EGRESS_H

/* Where the redirect sends TCP connections and DNS queries: 127.0.0.1, this port of each protocol. A high number, so that port 53
 * of the loopback stays free for a name server of the guest's own. */
#define EGRESS_PORT 65053

/* Serve the net port in a thread of its own. */
void egress_start(int fd);

#endif
