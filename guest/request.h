/* The map of an OPEN, copied out of the port's buffer and read field by field. Unknown keys are ignored. */
#ifndef TASKVM_REQUEST_H
#define TASKVM_REQUEST_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "frames.h"
#include "msgpack.h"

struct request {
	uint32_t stream;
	size_t length;
	const uint8_t *map; /* of the caller's, or behind the struct (request_copy) */
};

/* Why an operation failed: `call` is the system call or the field, and NULL when it did not fail. */
struct failure {
	int error;
	const char *call;
};

/* A copy that the caller frees, or NULL when memory is out. The map must be valid (msgpack_valid). */
struct request *request_copy(const struct frame *frame);
bool request_find(const struct request *request, const char *key, struct msgpack_value *value);
/* A map among the fields, to be read with msgpack_find; NULL when it is missing, nil or something else. */
const uint8_t *request_map(const struct request *request, const char *key, size_t *length);
/* False, with `failure` set, when the field is missing, no path, or longer than the kernel takes. */
bool request_path(const struct request *request, const char *key, char path[PATH_MAX], struct failure *failure);
int64_t request_integer(const struct request *request, const char *key, int64_t otherwise);
bool request_flag(const struct request *request, const char *key, bool otherwise);
/* Note a failed call with its errno; returns false, for `return fail_call(…)`. */
bool fail_call(struct failure *failure, int error, const char *call);

#endif
