/* As much msgpack as the protocol's maps need: every type is read over, few are written. */
#include "msgpack.h"

#include <string.h>

static bool take_number(struct msgpack_reader *reader, unsigned size, uint64_t *number)
{
	if ((size_t)(reader->end - reader->next) < size)
		return false;
	*number = 0;
	while (size--)
		*number = *number << 8 | *reader->next++;
	return true;
}

static bool read_unsigned(struct msgpack_reader *reader, struct msgpack_value *value, unsigned size)
{
	uint64_t number;
	if (!take_number(reader, size, &number))
		return false;
	value->type = number > INT64_MAX ? MSGPACK_OTHER : MSGPACK_INTEGER;
	value->integer = (int64_t)number;
	return true;
}

static bool read_signed(struct msgpack_reader *reader, struct msgpack_value *value, unsigned size)
{
	uint64_t number;
	if (!take_number(reader, size, &number))
		return false;
	unsigned shift = 64 - 8 * size;
	value->type = MSGPACK_INTEGER;
	value->integer = (int64_t)(number << shift) >> shift;
	return true;
}

static bool read_bytes(struct msgpack_reader *reader, struct msgpack_value *value, enum msgpack_type type, uint64_t length)
{
	if ((uint64_t)(reader->end - reader->next) < length)
		return false;
	value->type = type;
	value->bytes = reader->next;
	value->length = (size_t)length;
	reader->next += length;
	return true;
}

static bool read_sized(struct msgpack_reader *reader, struct msgpack_value *value, enum msgpack_type type, unsigned size)
{
	uint64_t length;
	return take_number(reader, size, &length) && read_bytes(reader, value, type, length);
}

static bool read_items(struct msgpack_reader *reader, struct msgpack_value *value, enum msgpack_type type, uint64_t count)
{
	/* Every item is at least a byte: a count beyond the rest is a lie, found before anyone allocates for it. */
	if (count > (uint64_t)(reader->end - reader->next))
		return false;
	value->type = type;
	value->bytes = reader->next;
	value->length = (size_t)count;
	return true;
}

static bool read_counted(struct msgpack_reader *reader, struct msgpack_value *value, enum msgpack_type type, unsigned size)
{
	uint64_t count;
	return take_number(reader, size, &count) && read_items(reader, value, type, count);
}

static bool read_tagged(struct msgpack_reader *reader, struct msgpack_value *value, uint8_t tag)
{
	static const uint8_t FIXED_EXTENSION[] = {2, 3, 5, 9, 17};
	switch (tag) {
	case 0xc0: return true;
	case 0xc2: case 0xc3:
		value->type = MSGPACK_BOOL;
		value->integer = tag & 1;
		return true;
	case 0xc4: case 0xc5: case 0xc6: return read_sized(reader, value, MSGPACK_BYTES, 1u << (tag - 0xc4));
	case 0xca: case 0xcb: return read_bytes(reader, value, MSGPACK_OTHER, tag == 0xca ? 4 : 8);
	case 0xcc: case 0xcd: case 0xce: case 0xcf: return read_unsigned(reader, value, 1u << (tag - 0xcc));
	case 0xd0: case 0xd1: case 0xd2: case 0xd3: return read_signed(reader, value, 1u << (tag - 0xd0));
	case 0xd4: case 0xd5: case 0xd6: case 0xd7: case 0xd8:
		return read_bytes(reader, value, MSGPACK_OTHER, FIXED_EXTENSION[tag - 0xd4]);
	case 0xd9: case 0xda: case 0xdb: return read_sized(reader, value, MSGPACK_BYTES, 1u << (tag - 0xd9));
	case 0xdc: case 0xdd: return read_counted(reader, value, MSGPACK_ARRAY, 2u << (tag - 0xdc));
	case 0xde: case 0xdf: return read_counted(reader, value, MSGPACK_MAP, 2u << (tag - 0xde));
	default: return false; /* 0xc1 is unused for good; the extensions of variable size have no use here */
	}
}

bool msgpack_read(struct msgpack_reader *reader, struct msgpack_value *value)
{
	if (reader->next == reader->end)
		return false;
	uint8_t tag = *reader->next++;
	*value = (struct msgpack_value){.type = MSGPACK_NIL};
	if (tag < 0x80 || tag >= 0xe0) {
		value->type = MSGPACK_INTEGER;
		value->integer = (int8_t)tag;
		return true;
	}
	if (tag < 0x90)
		return read_items(reader, value, MSGPACK_MAP, tag & 15);
	if (tag < 0xa0)
		return read_items(reader, value, MSGPACK_ARRAY, tag & 15);
	if (tag < 0xc0)
		return read_bytes(reader, value, MSGPACK_BYTES, tag & 31);
	return read_tagged(reader, value, tag);
}

static bool skip_items(struct msgpack_reader *reader, const struct msgpack_value *container, unsigned depth)
{
	uint64_t left = container->length;
	if (container->type == MSGPACK_MAP)
		left *= 2;
	else if (container->type != MSGPACK_ARRAY)
		return true;
	if (depth == MSGPACK_MAX_DEPTH)
		return false;
	while (left--) {
		struct msgpack_value item;
		if (!msgpack_read(reader, &item) || !skip_items(reader, &item, depth + 1))
			return false;
	}
	return true;
}

bool msgpack_read_whole(struct msgpack_reader *reader, struct msgpack_value *value)
{
	return msgpack_read(reader, value) && skip_items(reader, value, 0);
}

bool msgpack_valid(const uint8_t *bytes, size_t length)
{
	struct msgpack_reader reader = {bytes, bytes + length};
	struct msgpack_value map;
	return msgpack_read_whole(&reader, &map) && map.type == MSGPACK_MAP && reader.next == reader.end;
}

bool msgpack_find(const uint8_t *map, size_t length, const char *key, struct msgpack_value *value)
{
	struct msgpack_reader reader = {map, map + length};
	struct msgpack_value head, name;
	if (!msgpack_read(&reader, &head) || head.type != MSGPACK_MAP)
		return false;
	while (head.length--) {
		if (!msgpack_read_whole(&reader, &name) || !msgpack_read_whole(&reader, value))
			return false;
		if (name.type == MSGPACK_BYTES && name.length == strlen(key) && !memcmp(name.bytes, key, name.length))
			return true;
	}
	return false;
}

/* Writing. */

static void put(struct msgpack_writer *writer, const void *bytes, size_t length)
{
	if (length > writer->capacity - writer->length) {
		writer->overflow = true;
		return;
	}
	if (length)
		memcpy(writer->bytes + writer->length, bytes, length);
	writer->length += length;
}

static void put_number(struct msgpack_writer *writer, uint8_t tag, uint64_t number, unsigned size)
{
	uint8_t bytes[9] = {tag};
	for (unsigned i = 0; i < size; i++)
		bytes[1 + i] = (uint8_t)(number >> 8 * (size - 1 - i));
	put(writer, bytes, 1 + size);
}

void msgpack_write_map(struct msgpack_writer *writer, unsigned pairs)
{
	put_number(writer, (uint8_t)(0x80 | pairs), 0, 0);
}

void msgpack_write_string(struct msgpack_writer *writer, const char *text)
{
	size_t length = strlen(text);
	if (length < 32)
		put_number(writer, (uint8_t)(0xa0 | length), 0, 0);
	else
		put_number(writer, 0xda, length, 2);
	put(writer, text, length);
}

void msgpack_write_bytes(struct msgpack_writer *writer, const void *bytes, size_t length)
{
	put_number(writer, 0xc6, length, 4);
	put(writer, bytes, length);
}

void msgpack_write_integer(struct msgpack_writer *writer, int64_t value)
{
	if (value >= 0 && value < 128)
		put_number(writer, (uint8_t)value, 0, 0);
	else
		put_number(writer, 0xd3, (uint64_t)value, 8);
}
