/* Numbers in the text files of the kernel. No system calls; fuzzed by tests/fuzz.c. */
#ifndef TASKVM_COUNTERS_H
#define TASKVM_COUNTERS_H

#include <stdint.h>

/* The sum of all numbers that follow `name` as a word of its own, after a space or `=`; 0 when there is none. An empty name
 * is the number that the text begins with. No sum exceeds INT64_MAX. */
int64_t counter_sum(const char *text, const char *name);

#endif
