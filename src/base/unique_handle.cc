#include "base/unique_handle.h"

#include <unistd.h>

namespace baton {

void FileDescriptorTraits::close(int fd) { ::close(fd); }

}  // namespace baton
