/* The whole test framework: a claim that does not hold is printed and ends the program with 1. */
#ifndef TASKVM_CHECK_H
#define TASKVM_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(claim)                                                               \
	do {                                                                       \
		if (!(claim)) {                                                    \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #claim); \
			exit(1);                                                   \
		}                                                                  \
	} while (0)

#define RUN(test)                        \
	do {                             \
		test();                  \
		printf("ok %s\n", #test); \
	} while (0)

#endif
