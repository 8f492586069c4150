/* The C interface: this process receives, its child sends, a socket pair carries what they have to tell each other.
 *
 *   send_blocks_c [auto|shm|tcp]
 */
#include <baton/transfer_c.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { kBlocks = 256, kStride = 64 << 10 };

static baton_error error;

static void check(baton_code code, const char* what) {
  if (code == BATON_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, baton_code_name(code), error.message);
  exit(1);
}

/* A pipe may give less than was asked for; a datagram-like socket pair (SOCK_SEQPACKET) does not. */
static void tell(int channel, const void* data, size_t bytes) {
  if (send(channel, data, bytes, MSG_NOSIGNAL) != (ssize_t)bytes) {
    perror("send");
    exit(1);
  }
}
static size_t hear(int channel, void* data, size_t room) {
  ssize_t bytes = recv(channel, data, room, 0);
  if (bytes <= 0) {
    fprintf(stderr, "the other process is gone\n");
    exit(1);
  }
  return (size_t)bytes;
}

struct node {
  baton_agent* agent;
  unsigned char* memory;
  baton_region* region;
  uint32_t pool;
};

static struct node open_node(const char* name, const char* transport) {
  struct node node = {0};
  baton_agent_config config;
  baton_agent_config_init(&config, sizeof config);
  config.name = name;
  config.transport = transport;
  config.bind_address = "127.0.0.1";
  check(baton_agent_create(&config, &node.agent, &error), "creating an agent");
  node.memory = calloc(kBlocks, kStride);
  check(baton_agent_register_memory(node.agent, node.memory, (size_t)kBlocks * kStride, BATON_MEMORY_HOST,
                                    &node.region, &error), "registering memory");
  check(baton_agent_add_pool(node.agent, node.region, kStride, kBlocks, &node.pool, &error), "adding a pool");
  return node;
}

static void close_node(struct node* node) {
  baton_agent_destroy(node->agent);
  baton_region_release(node->region);
  free(node->memory);
}

static void send_all(int channel, const char* transport) {
  struct node node = open_node("sender", transport);
  char metadata[65536];
  size_t bytes = hear(channel, metadata, sizeof metadata);
  baton_tag tag = 0;
  hear(channel, &tag, sizeof tag);
  baton_peer* peer = NULL;
  check(baton_agent_connect(node.agent, metadata, bytes, &peer, &error), "connecting");

  baton_block_pair blocks[kBlocks];
  for (uint32_t i = 0; i < kBlocks; ++i) {
    memset(node.memory + (size_t)i * kStride, (int)(i + 1), kStride);
    blocks[i].local_block = i;
    blocks[i].remote_block = kBlocks - 1 - i;
  }
  baton_write write;
  baton_write_init(&write, sizeof write);
  write.local_pool = node.pool;
  write.remote_pool = 0;
  write.blocks = blocks;
  write.block_count = kBlocks;
  write.length_bytes = kStride;
  write.tag = tag;
  write.timeout_ms = 10000;
  baton_transfer* transfer = NULL;
  uint64_t messages = 0;
  check(baton_peer_write(peer, &write, NULL, NULL, &transfer, &messages, &error), "writing");
  tell(channel, &messages, sizeof messages);
  check(baton_transfer_wait(transfer, &error), "the write");
  baton_path_info path = {.size = sizeof path};
  check(baton_peer_get_path(peer, &path, &error), "path");
  printf("path %s (provider %s): %s, %.2f GB/s\n", path.transport, path.provider, path.reason,
         path.bandwidth_bytes_per_s * 1e-9);
  baton_transfer_release(transfer);

  /* And back. When it is done the blocks are here. */
  baton_read read;
  baton_read_init(&read, sizeof read);
  read.local_pool = node.pool;
  read.remote_pool = 0;
  read.blocks = blocks;
  read.block_count = kBlocks;
  read.length_bytes = kStride;
  read.timeout_ms = 10000;
  memset(node.memory, 0, (size_t)kBlocks * kStride);
  check(baton_peer_read(peer, &read, NULL, NULL, &transfer, &error), "reading");
  check(baton_transfer_wait(transfer, &error), "the read");
  for (int i = 0; i < kBlocks; ++i) {
    if (node.memory[(size_t)i * kStride] != (unsigned char)(i + 1)) {
      fprintf(stderr, "block %d is not what was read\n", i);
      exit(1);
    }
  }
  tell(channel, &messages, sizeof messages); /* the receiver may go */
  baton_transfer_release(transfer);
  baton_peer_release(peer);
  close_node(&node);
}

static void receive_all(int channel, const char* transport) {
  struct node node = open_node("receiver", transport);
  char metadata[65536];
  size_t bytes = sizeof metadata;
  check(baton_agent_metadata(node.agent, metadata, &bytes, &error), "metadata");
  tell(channel, metadata, bytes);
  baton_tag tag = 0;
  check(baton_inbox_open(node.agent, &tag, &error), "opening an inbox");
  tell(channel, &tag, sizeof tag);
  uint64_t messages = 0;
  hear(channel, &messages, sizeof messages);
  check(baton_inbox_wait(node.agent, tag, messages, 10000, &error), "waiting");
  baton_inbox_close(node.agent, tag);
  for (int i = 0; i < kBlocks; ++i) {
    const unsigned char* block = node.memory + (size_t)(kBlocks - 1 - i) * kStride;
    for (int k = 0; k < kStride; ++k) {
      if (block[k] != (unsigned char)(i + 1)) {
        fprintf(stderr, "block %d is not what was sent\n", i);
        exit(1);
      }
    }
  }
  printf("received %d blocks of %d KiB, all right\n", kBlocks, kStride >> 10);
  hear(channel, &messages, sizeof messages); /* it has read them back */
  close_node(&node);
}

int main(int argc, char** argv) {
  const char* transport = argc > 1 ? argv[1] : "auto";
  int channel[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, channel) != 0) {
    perror("socketpair");
    return 1;
  }
  pid_t child = fork(); /* before there are threads */
  if (child == 0) {
    close(channel[0]);
    send_all(channel[1], transport);
    return 0;
  }
  close(channel[1]);
  receive_all(channel[0], transport);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? 0 : 1;
}
