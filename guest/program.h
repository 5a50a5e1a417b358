/* What an OPEN of `exec` says of the program: its arguments, variables, directory and user. No system calls; fuzzed by tests/fuzz.c. */
#ifndef TASKVM_PROGRAM_H
#define TASKVM_PROGRAM_H

#include "request.h"

enum { PROGRAM_MAX_GROUPS = 64 };
#ifndef PROGRAM_ROOM
#define PROGRAM_ROOM (16 * 1024)
#endif

struct program {
	char **argv, **env, cwd[PATH_MAX]; /* each list one block that ends with NULL; argv[0] is not empty */
	uint32_t uid, gid, groups[PROGRAM_MAX_GROUPS];
	size_t group_count;
	size_t used; /* of `room`, where the strings of most programs lie; those of others come from the heap */
	_Alignas(16) char room[PROGRAM_ROOM];
};

/* False, with `failure` set, when a field is missing, malformed, or more than this agent takes. Either way program_free is due. */
bool program_read(struct program *program, const struct request *request, struct failure *failure);
void program_free(struct program *program);

#endif
