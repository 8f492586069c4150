/* The C interface, used from C: blocks between two agents of one process, and what is told when something is wrong. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "transfer/include/baton/transfer_c.h"

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: %s is not so\n", __FILE__, __LINE__, #condition);     \
      exit(1);                                                                      \
    }                                                                               \
  } while (0)
#define CHECK_OK(call)                                                                              \
  do {                                                                                              \
    if ((call) != BATON_OK) {                                                                       \
      fprintf(stderr, "%s:%d: %s: %s: %s\n", __FILE__, __LINE__, #call, baton_code_name(error.code), \
              error.message);                                                                       \
      exit(1);                                                                                      \
    }                                                                                               \
  } while (0)

enum { kBlocks = 32, kStride = 8192 };

static baton_error error;
static int integrity; /* of the agents that open_node() makes */

struct node {
  baton_agent* agent;
  unsigned char* memory;
  baton_region* region;
  uint32_t pool;
};

static void open_node(struct node* node, const char* name, const char* transport) {
  baton_agent_config config;
  baton_agent_config_init(&config, sizeof config);
  config.name = name;
  config.transport = transport;
  config.bind_address = "127.0.0.1";
  CHECK(config.integrity == 0);
  config.integrity = integrity;
  CHECK_OK(baton_agent_create(&config, &node->agent, &error));
  CHECK(baton_agent_epoch(node->agent) != 0);
  node->memory = calloc(kBlocks, kStride);
  CHECK_OK(baton_agent_register_memory(node->agent, node->memory, kBlocks * kStride, BATON_MEMORY_HOST, &node->region,
                                       &error));
  CHECK_OK(baton_agent_add_pool(node->agent, node->region, kStride, kBlocks, &node->pool, &error));
}

static void close_node(struct node* node) {
  baton_agent_destroy(node->agent);
  baton_region_release(node->region); /* after its agent: any order will do */
  free(node->memory);
}

static baton_peer* connect_nodes(struct node* from, struct node* to) {
  size_t bytes = 0;
  baton_peer* peer = NULL;
  CHECK(baton_agent_metadata(to->agent, NULL, &bytes, &error) == BATON_RESOURCE_EXHAUSTED);
  CHECK(bytes > 0);
  void* metadata = malloc(bytes);
  CHECK_OK(baton_agent_metadata(to->agent, metadata, &bytes, &error));
  CHECK_OK(baton_agent_connect(from->agent, metadata, bytes, &peer, &error));
  free(metadata);
  return peer;
}

static atomic_int done_calls, done_code, complete_calls;
static void on_done(void* user, baton_code code, const char* message) {
  CHECK(user == &done_calls && message != NULL);
  atomic_store(&done_code, (int)code);
  atomic_fetch_add(&done_calls, 1);
}
static void on_complete(void* user) { atomic_fetch_add((atomic_int*)user, 1); }

static void blocks_move(const char* transport) {
  struct node receiver, sender;
  atomic_store(&done_calls, 0);
  atomic_store(&complete_calls, 0);
  open_node(&receiver, "receiver", transport);
  open_node(&sender, "sender", transport);
  for (size_t i = 0; i < (size_t)kBlocks * kStride; ++i) sender.memory[i] = (unsigned char)(i * 7 + i / kStride);

  baton_peer* peer = connect_nodes(&sender, &receiver);
  CHECK(baton_peer_epoch(peer) == baton_agent_epoch(receiver.agent));
  CHECK(strcmp(baton_peer_name(peer), "receiver") == 0);
  CHECK(baton_peer_alive(peer));

  baton_tag tag = 0;
  CHECK_OK(baton_inbox_open(receiver.agent, &tag, &error));
  CHECK(tag != 0);
  const baton_block_pair blocks[] = {{0, 9}, {5, 1}, {31, 30}};
  baton_write write;
  baton_write_init(&write, sizeof write);
  write.local_pool = sender.pool;
  write.remote_pool = receiver.pool;
  write.blocks = blocks;
  write.block_count = 3;
  write.offset_bytes = 100;
  write.length_bytes = kStride - 200;
  write.tag = tag;
  baton_transfer* transfer = NULL;
  uint64_t messages = 0;
  CHECK_OK(baton_peer_write(peer, &write, on_done, &done_calls, &transfer, &messages, &error));
  CHECK(messages > 0 && messages == baton_transfer_messages(transfer));
  CHECK(baton_transfer_bytes(transfer) == 3 * write.length_bytes);
  CHECK_OK(baton_inbox_wait(receiver.agent, tag, messages, 20000, &error));
  for (int i = 0; i < 3; ++i) {
    const unsigned char* from = sender.memory + blocks[i].local_block * kStride;
    const unsigned char* to = receiver.memory + blocks[i].remote_block * kStride;
    CHECK(memcmp(from + 100, to + 100, kStride - 200) == 0);
    CHECK(to[99] == 0 && to[kStride - 100] == 0);
  }
  CHECK_OK(baton_transfer_wait(transfer, &error));
  CHECK(baton_transfer_done(transfer) && baton_transfer_settled(transfer));
  CHECK_OK(baton_transfer_status(transfer, &error));
  CHECK(error.code == BATON_OK && error.message[0] == '\0');
  baton_transfer_release(transfer);

  /* Nobody asks for this one, but its callback comes; the inbox goes on counting. */
  CHECK_OK(baton_inbox_expect(receiver.agent, tag, 2 * messages, on_complete, &complete_calls, &error));
  CHECK_OK(baton_peer_write(peer, &write, on_done, &done_calls, NULL, NULL, &error));
  while (atomic_load(&complete_calls) == 0 || atomic_load(&done_calls) < 2) {
  }
  CHECK(atomic_load(&done_code) == BATON_OK);
  CHECK(baton_inbox_arrived(receiver.agent, tag) == 2 * messages);
  CHECK(baton_inbox_wait(receiver.agent, tag, 1000000, 1, &error) == BATON_DEADLINE_EXCEEDED);
  CHECK(strstr(error.message, "of 1000000 messages") != NULL);
  baton_inbox_close(receiver.agent, tag);
  CHECK(baton_inbox_wait(receiver.agent, tag, 1, 1, &error) == BATON_NOT_FOUND);

  baton_path_info path = {.size = sizeof path};
  CHECK_OK(baton_peer_get_path(peer, &path, &error));
  CHECK(strcmp(path.transport, transport) == 0 && path.rails >= 1 && path.reason[0] != '\0');
  baton_peer_stats peer_stats = {.size = sizeof peer_stats};
  CHECK_OK(baton_peer_get_stats(peer, &peer_stats, &error));
  CHECK(peer_stats.writes == 2 && peer_stats.bytes == 6 * write.length_bytes);
  baton_agent_stats stats = {.size = sizeof stats};
  CHECK_OK(baton_agent_get_stats(receiver.agent, &stats, &error));
  CHECK(stats.messages_received == 2 * messages && stats.regions == 1);
  CHECK(stats.checked_blocks == (integrity ? 6u : 0u) && stats.corrupt_blocks == 0);
  char text[16];
  CHECK(baton_agent_describe(sender.agent, text, sizeof text) >= strlen(text) && strlen(text) <= 15);

  /* And back, into blocks where nothing is yet. */
  const baton_block_pair back[] = {{1, 9}, {2, 30}};
  memset(sender.memory + kStride, 0, 2 * kStride);
  baton_read read;
  baton_read_init(&read, sizeof read);
  read.local_pool = sender.pool;
  read.remote_pool = receiver.pool;
  read.blocks = back;
  read.block_count = 2;
  read.offset_bytes = 50;
  read.length_bytes = kStride - 100;
  CHECK_OK(baton_peer_read(peer, &read, on_done, &done_calls, &transfer, &error));
  CHECK_OK(baton_transfer_wait(transfer, &error));
  CHECK(baton_transfer_settled(transfer) && baton_transfer_messages(transfer) == 0);
  CHECK(baton_transfer_bytes(transfer) == 2 * read.length_bytes);
  for (int i = 0; i < 2; ++i) {
    const unsigned char* to = sender.memory + back[i].local_block * kStride;
    CHECK(memcmp(receiver.memory + back[i].remote_block * kStride + 50, to + 50, kStride - 100) == 0);
    CHECK(to[49] == 0 && to[kStride - 50] == 0);
  }
  baton_transfer_release(transfer);
  CHECK_OK(baton_peer_read(peer, &read, on_done, &done_calls, NULL, &error));
  while (atomic_load(&done_calls) < 4) {
  }
  CHECK(atomic_load(&done_code) == BATON_OK);
  CHECK_OK(baton_peer_get_stats(peer, &peer_stats, &error));
  CHECK(peer_stats.reads == 2 && peer_stats.read_bytes == 4 * read.length_bytes && peer_stats.writes == 2);
  read.blocks = &(baton_block_pair){kBlocks, 0};
  read.block_count = 1;
  CHECK(baton_peer_read(peer, &read, NULL, NULL, NULL, &error) == BATON_INVALID_ARGUMENT);
  read.timeout_ms = -1;
  CHECK(baton_peer_read(peer, &read, NULL, NULL, NULL, &error) == BATON_INVALID_ARGUMENT);

  /* What the caller was not compiled with is not written. */
  struct {
    baton_agent_stats stats;
  } old;
  memset(&old, 0xee, sizeof old);
  old.stats.size = offsetof(baton_agent_stats, registered_bytes);
  CHECK_OK(baton_agent_get_stats(receiver.agent, &old.stats, &error));
  CHECK(old.stats.regions == 1 && old.stats.registered_bytes == 0xeeeeeeeeeeeeeeeeull);

  /* A block that is not there, then a peer that is not there any more. */
  const baton_block_pair outside = {0, kBlocks};
  write.blocks = &outside;
  write.block_count = 1;
  transfer = NULL;
  CHECK(baton_peer_write(peer, &write, NULL, NULL, &transfer, NULL, &error) == BATON_INVALID_ARGUMENT);
  CHECK(transfer == NULL && strstr(error.message, "has 32") != NULL);
  CHECK_OK(baton_peer_close(peer, &error));
  CHECK(!baton_peer_alive(peer));
  write.blocks = blocks;
  CHECK(baton_peer_write(peer, &write, NULL, NULL, &transfer, NULL, &error) == BATON_UNAVAILABLE);
  CHECK(strstr(error.message, "receiver") != NULL);
  CHECK_OK(baton_agent_fence(receiver.agent, baton_agent_epoch(sender.agent), &error));
  close_node(&sender);
  CHECK(baton_peer_write(peer, &write, NULL, NULL, &transfer, NULL, &error) == BATON_UNAVAILABLE);
  baton_peer_release(peer);
  close_node(&receiver);
}

static void manual_progress_is_the_callers(void) {
  baton_agent_config config;
  baton_agent_config_init(&config, sizeof config);
  CHECK(config.allow_tcp == 1 && config.default_timeout_ms > 0 && config.max_served_reads > 0 && strcmp(config.transport, "auto") == 0);
  config.transport = "shm";
  config.manual_progress = 1;
  baton_agent* agent = NULL;
  CHECK_OK(baton_agent_create(&config, &agent, &error));
  size_t count = 99;
  CHECK_OK(baton_agent_progress(agent, &count, &error));
  CHECK(count != 99);
  baton_tag tag = 0;
  CHECK_OK(baton_inbox_open(agent, &tag, &error));
  CHECK(baton_inbox_wait(agent, tag, 1, 1, &error) == BATON_FAILED_PRECONDITION);
  baton_agent_destroy(agent);
}

static atomic_int lines;
static void count_lines(void* user, baton_log_level level, const char* message) {
  CHECK(level >= BATON_LOG_DEBUG && level <= BATON_LOG_ERROR && strlen(message) > 0);
  atomic_fetch_add((atomic_int*)user, 1);
}

static void mistakes_are_told(void) {
  baton_agent* agent = NULL;
  baton_agent_config config;
  baton_agent_config_init(&config, sizeof config);
  config.transport = "pigeon";
  CHECK(baton_agent_create(&config, &agent, &error) == BATON_INVALID_ARGUMENT);
  CHECK(agent == NULL && strstr(error.message, "pigeon") != NULL);
  config.size = 0;
  CHECK(baton_agent_create(&config, &agent, &error) == BATON_INVALID_ARGUMENT);
  CHECK(strstr(error.message, "baton_agent_config_init") != NULL);
  CHECK(baton_agent_create(NULL, NULL, &error) == BATON_INVALID_ARGUMENT);

  /* As if compiled when the structure ended after `transport`: what lies behind is not looked at. */
  memset(&config, 0xff, sizeof config);
  baton_agent_config_init(&config, offsetof(baton_agent_config, bind_address));
  config.name = "old";
  config.transport = "shm";
  baton_set_log_function(count_lines, &lines);
  baton_set_log_level(BATON_LOG_INFO);
  CHECK_OK(baton_agent_create(&config, &agent, &error));
  CHECK(atomic_load(&lines) > 0);
  baton_set_log_level(BATON_LOG_ERROR);
  baton_set_log_function(NULL, NULL);

  baton_peer* peer = NULL;
  CHECK(baton_agent_connect(agent, "nonsense", 8, &peer, &error) == BATON_INVALID_ARGUMENT);
  CHECK(baton_agent_connect(agent, NULL, 8, &peer, NULL) == BATON_INVALID_ARGUMENT);
  baton_region* region = NULL;
  char byte = 0;
  CHECK(baton_agent_register_memory(agent, &byte, 0, BATON_MEMORY_HOST, &region, &error) == BATON_INVALID_ARGUMENT);
  CHECK(baton_agent_register_memory(agent, &byte, 1, 2, &region, &error) == BATON_INVALID_ARGUMENT);
  CHECK_OK(baton_agent_register_memory(agent, &byte, 1, BATON_MEMORY_HOST, &region, &error));
  uint32_t pool = 0;
  CHECK(baton_agent_add_pool(agent, region, 1, 2, &pool, &error) == BATON_INVALID_ARGUMENT);
  baton_region_release(region);
  CHECK(baton_agent_progress(agent, NULL, &error) == BATON_FAILED_PRECONDITION);
  baton_agent_destroy(agent);

  /* Nothing, everywhere. */
  baton_agent_destroy(NULL);
  baton_region_release(NULL);
  baton_peer_release(NULL);
  baton_transfer_release(NULL);
  baton_transfer_cancel(NULL);
  CHECK(baton_agent_epoch(NULL) == 0 && baton_peer_epoch(NULL) == 0 && !baton_peer_alive(NULL));
  CHECK(baton_peer_write(NULL, NULL, NULL, NULL, NULL, NULL, NULL) == BATON_INVALID_ARGUMENT);
  CHECK(baton_peer_read(NULL, NULL, NULL, NULL, NULL, NULL) == BATON_INVALID_ARGUMENT);
  CHECK(baton_transfer_wait(NULL, &error) == BATON_INVALID_ARGUMENT && strstr(error.message, "NULL") != NULL);
  CHECK(strcmp(baton_code_name(BATON_DATA_LOSS), "DATA_LOSS") == 0);
  CHECK(strcmp(baton_code_name(77), "UNKNOWN") == 0);
  CHECK(strlen(baton_transfer_version()) > 0);
}

int main(void) {
  baton_set_log_level(BATON_LOG_ERROR);
  blocks_move("shm");
  blocks_move("tcp");
  integrity = 1;
  blocks_move("shm");
  integrity = 0;
  manual_progress_is_the_callers();
  mistakes_are_told();
  puts("ok");
  return 0;
}
