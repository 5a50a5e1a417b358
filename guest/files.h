/* The file operations of the control port. Each runs in a thread of the pool, as root, on the guest's own file systems. */
#ifndef TASKVM_FILES_H
#define TASKVM_FILES_H

#include "transfer.h"

void files_read(struct transfer *transfer);
void files_write(struct transfer *transfer);
void files_stat(struct transfer *transfer);
void files_list(struct transfer *transfer);
void files_chmod(struct transfer *transfer);
void files_symlink(struct transfer *transfer);
void files_readlink(struct transfer *transfer);
void files_mkdir(struct transfer *transfer);
void files_rename(struct transfer *transfer);
void files_remove(struct transfer *transfer);

#endif
