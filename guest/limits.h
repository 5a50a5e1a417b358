/* The numbers of the contract between host and guest: docs/protocol-control.md. Kept equal to src/taskvm/wire/frames.py by a test. */
#ifndef TASKVM_LIMITS_H
#define TASKVM_LIMITS_H

#define PROTOCOL_VERSION 1
#define HEADER_SIZE 12
#define MAX_PAYLOAD (1024 * 1024 + 64 * 1024) /* one FUSE message of 1 MiB and its headers */
#define MAX_MAP (1024 * 1024)
#define MAX_DATA (64 * 1024)
#define MAX_DATAGRAM 4096
#define INITIAL_CREDIT (256 * 1024)
#define GUEST_STREAM_BIT 0x80000000u

enum frame_type {
	FRAME_OPEN = 1,
	FRAME_REPLY = 2,
	FRAME_DATA = 3,
	FRAME_CREDIT = 4,
	FRAME_END = 5,
	FRAME_RESET = 6,
	FRAME_SIGNAL = 7,
	FRAME_EXIT = 8,
	FRAME_HELLO = 9,
	FRAME_DATAGRAM = 10,
	FRAME_QUIESCE = 11,
	FRAME_QUIESCED = 12,
	FRAME_RESUME = 13,
	FRAME_FUSE = 14,
};

#define CHANNEL_STDIN 0
#define CHANNEL_STDOUT 1
#define CHANNEL_STDERR 2

#define PORT_CONTROL "taskvm.control"
#define PORT_FS "taskvm.fs"
#define PORT_NET "taskvm.net"

#endif
