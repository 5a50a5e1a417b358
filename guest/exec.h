/* Running programs: their pipes, signals and exits, in the control thread. */
#ifndef TASKVM_EXEC_H
#define TASKVM_EXEC_H

#include "request.h"

void exec_init(void);
/* Begin an exec; takes the request. */
void exec_open(struct request *request);
/* The port has room again: go on with outputs that waited for it. */
void exec_resume(void);
/* Free what the last batch of events ended. */
void exec_settle(void);

#endif
