/* Fields of a request. A field of the wrong type counts as missing. */
#include "request.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct request *request_copy(const struct frame *frame)
{
	struct request *request = malloc(sizeof(*request) + frame->length);
	if (!request)
		return NULL;
	uint8_t *map = (uint8_t *)(request + 1);
	memcpy(map, frame->payload, frame->length);
	*request = (struct request){.stream = frame->stream, .length = frame->length, .map = map};
	return request;
}

bool request_find(const struct request *request, const char *key, struct msgpack_value *value)
{
	return msgpack_find(request->map, request->length, key, value);
}

const uint8_t *request_map(const struct request *request, const char *key, size_t *length)
{
	struct msgpack_value value;
	struct msgpack_reader reader = {request->map, request->map + request->length};
	if (!msgpack_read(&reader, &value))
		return NULL;
	for (size_t left = value.length; left > 0; left--) {
		struct msgpack_value name;
		if (!msgpack_read_whole(&reader, &name))
			return NULL;
		const uint8_t *start = reader.next;
		if (!msgpack_read_whole(&reader, &value))
			return NULL;
		if (name.type != MSGPACK_BYTES || name.length != strlen(key) || memcmp(name.bytes, key, name.length))
			continue;
		*length = (size_t)(reader.next - start);
		return value.type == MSGPACK_MAP ? start : NULL;
	}
	return NULL;
}

bool fail_call(struct failure *failure, int error, const char *call)
{
	failure->error = error;
	failure->call = call;
	return false;
}

bool request_path(const struct request *request, const char *key, char path[PATH_MAX], struct failure *failure)
{
	struct msgpack_value value;
	if (!request_find(request, key, &value) || value.type != MSGPACK_BYTES || !value.length ||
	    memchr(value.bytes, 0, value.length))
		return fail_call(failure, EINVAL, key);
	if (value.length >= PATH_MAX)
		return fail_call(failure, ENAMETOOLONG, key);
	memcpy(path, value.bytes, value.length);
	path[value.length] = 0;
	return true;
}

int64_t request_integer(const struct request *request, const char *key, int64_t otherwise)
{
	struct msgpack_value value;
	return request_find(request, key, &value) && value.type == MSGPACK_INTEGER ? value.integer : otherwise;
}

bool request_flag(const struct request *request, const char *key, bool otherwise)
{
	struct msgpack_value value;
	return request_find(request, key, &value) && value.type == MSGPACK_BOOL ? value.integer != 0 : otherwise;
}
