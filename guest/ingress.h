/* The way in: connections that the host opens to servers on the guest's loopback (docs/protocol-control.md, The net port). */
#ifndef TASKVM_INGRESS_H
#define TASKVM_INGRESS_H

#include <stdint.h>

#include "frames.h"
#include "request.h"

/* The port that an OPEN asks to be connected to; 0, with `failure` set, when it asks for anything but the loopback. */
uint16_t ingress_port(const struct frame *frame, struct failure *failure);
/* Begin to connect to the loopback of `family` (AF_INET, AF_INET6); the descriptor, or -1 with errno. That nobody listens is never
 * known at once: the socket reports it. */
int ingress_dial(int family, uint16_t port);

#endif
