/* BERT's tokenizer: UTF-8 to token ids. `wordpiece_tables.py` reads the normalization of characters and the
   vocabulary from the model's own tokenizer. The tables are constant after `layertap_wordpiece_build`, so
   several threads may use them at the same time. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_WORD 512 /* the same in wordpiece_tables.py */

/* Kinds of characters: not in the table; part of a word; a word by itself; white space, which ends a word; a
   character that is normalized to several, or to none. */
enum { UNKNOWN, PART, ALONE, SPACE, SEVERAL };

/* An entry of `characters` is the normalization of a code point: kind, flag and value. */
#define KIND(entry) ((entry) & 7)
#define MAY_BEGIN_ADDED(entry) ((entry) & 8)
#define VALUE(entry) ((entry) >> 4) /* PART, ALONE: a code point; SEVERAL: an index into `several` */

typedef struct {
    const uint32_t *characters; /* by code point */
    int64_t num_characters;
    const uint32_t *several; /* a number n, followed by n entries that are not SEVERAL */
    const uint8_t *added;    /* added tokens, each a length and UTF-8; a length of 0 ends the list */
    /* Hash table with linear probing. A slot is 0 if empty; otherwise its upper half is the lower half of the
       hash, and its lower half 1 + an index into `pieces`. */
    const uint64_t *slots;
    int64_t log2_slots;
    const uint32_t *pieces; /* of each: id, 2 * length + (1 if it continues a word), code points */
    int64_t max_piece;      /* characters of the longest piece */
    int64_t max_word;       /* a longer word is unknown */
    int64_t unknown_id;
} tables;

/* The special tokens before and after a text. */
typedef struct {
    const int64_t *before;
    int64_t num_before;
    const int64_t *after;
    int64_t num_after;
} special;

/* The size in bytes of a structure that Python fills, or 0 if there is none of this name. Python compares the
   sizes with its own when it loads the library. */
int64_t layertap_sizeof(const char *name)
{
    if (!strcmp(name, "tables")) return sizeof(tables);
    if (!strcmp(name, "special")) return sizeof(special);
    return 0;
}

typedef struct {
    const tables *tables;
    int64_t *ids;
    int64_t capacity;
    int64_t num; /* more than `capacity` if the ids do not fit */
    int64_t word_length;
    uint32_t word[MAX_WORD];
} state;

static inline uint64_t hashed(uint64_t hash, uint32_t character)
{
    return (((hash << 5) | (hash >> 59)) ^ character) * UINT64_C(0x517cc1b727220a95);
}

static inline uint64_t first_hash(int continues) { return continues ? UINT64_C(0x9e3779b97f4a7c15) : 0; }

/* The entry of `pieces` with these characters, or NULL. */
static inline const uint32_t *find(const tables *t, uint64_t hash, const uint32_t *characters,
                                   uint32_t length, int continues)
{
    uint64_t mask = (UINT64_C(1) << t->log2_slots) - 1;
    for (uint64_t at = hash >> (64 - t->log2_slots);; at = (at + 1) & mask) {
        uint64_t slot = t->slots[at];
        if (slot == 0) return NULL;
        if (slot >> 32 != (uint32_t)hash) continue;
        const uint32_t *piece = t->pieces + (uint32_t)slot - 1;
        if (piece[1] == 2 * length + (uint32_t)continues &&
            memcmp(piece + 2, characters, length * sizeof *characters) == 0)
            return piece;
    }
}

static inline void append_id(state *s, int64_t id)
{
    if (s->num < s->capacity) s->ids[s->num] = id;
    s->num++;
}

/* Appends the tokens of the current word: from the left, the longest piece that matches each time. A word
   that cannot be divided into pieces is one unknown token. */
static void end_word(state *s)
{
    const tables *t = s->tables;
    int64_t length = s->word_length, num_before = s->num, start = 0;
    uint64_t hashes[MAX_WORD];
    s->word_length = 0;
    if (length > t->max_word) {
        append_id(s, t->unknown_id);
        return;
    }
    while (start < length) {
        int64_t size = length - start < t->max_piece ? length - start : t->max_piece;
        const uint32_t *rest = s->word + start, *piece = NULL;
        uint64_t hash = first_hash(start > 0);
        for (int64_t i = 0; i < size; i++) hashes[i] = hash = hashed(hash, rest[i]);
        while (size > 0 && !(piece = find(t, hashes[size - 1], rest, (uint32_t)size, start > 0))) size--;
        if (!piece) {
            s->num = num_before;
            append_id(s, t->unknown_id);
            return;
        }
        append_id(s, piece[0]);
        start += size;
    }
}

static inline void append_character(state *s, uint32_t character)
{
    if (s->word_length < s->tables->max_word) s->word[s->word_length] = character;
    s->word_length++;
}

/* Applies an entry that is not SEVERAL to the current word. */
static inline void process(state *s, uint32_t entry)
{
    if (KIND(entry) == PART) {
        append_character(s, VALUE(entry));
        return;
    }
    if (s->word_length) end_word(s);
    if (KIND(entry) == ALONE) {
        append_character(s, VALUE(entry));
        end_word(s);
    }
}

/* Whether an added token is at the beginning of `text`. */
static int begins_added(const tables *t, const uint8_t *text, int64_t size)
{
    for (const uint8_t *one = t->added; *one; one += 1 + *one)
        if (size >= *one && memcmp(text, one + 1, *one) == 0) return 1;
    return 0;
}

/* The code point at `text`. `num_bytes` is set to its length in bytes, or to 0 if the bytes are not valid. */
static inline uint32_t decode(const uint8_t *text, int64_t size, int64_t *num_bytes)
{
    uint32_t first = text[0];
    int64_t wanted = first < 0x80 ? 1 : first < 0xc0 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf8 ? 4 : 0;
    if (wanted == 1) {
        *num_bytes = 1;
        return first;
    }
    *num_bytes = 0;
    if (wanted == 0 || wanted > size) return 0;
    uint32_t code = first & (0x7f >> wanted);
    for (int64_t i = 1; i < wanted; i++) {
        if ((text[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | (text[i] & 0x3f);
    }
    *num_bytes = wanted;
    return code;
}

/* Writes the ids of one text, special tokens included. Returns their number, or -1 if the model's own
   tokenizer has to encode the text: it has a character that is not in the table, or an added token, or more
   ids than `capacity`. */
EXPORT int64_t layertap_wordpiece(const tables *t, const special *around, const uint8_t *text, int64_t size,
                                  int64_t *ids, int64_t capacity)
{
    state s;
    s.tables = t;
    s.ids = ids;
    s.capacity = capacity;
    s.num = s.word_length = 0;
    for (int64_t i = 0; i < around->num_before; i++) append_id(&s, around->before[i]);
    for (int64_t at = 0, num_bytes; at < size; at += num_bytes) {
        uint32_t code = decode(text + at, size - at, &num_bytes);
        if (num_bytes == 0 || code >= t->num_characters) return -1;
        uint32_t entry = t->characters[code];
        if (MAY_BEGIN_ADDED(entry) && begins_added(t, text + at, size - at)) return -1;
        if (KIND(entry) == UNKNOWN) return -1;
        if (KIND(entry) != SEVERAL) {
            process(&s, entry);
            continue;
        }
        const uint32_t *several = t->several + VALUE(entry);
        for (uint32_t i = 1; i <= several[0]; i++) process(&s, several[i]);
    }
    if (s.word_length) end_word(&s);
    for (int64_t i = 0; i < around->num_after; i++) append_id(&s, around->after[i]);
    return s.num <= capacity ? s.num : -1;
}

/* Encodes many texts that lie end to end, and writes their ids end to end. counts[i] is the number of ids of
   text i, or -1, as returned by `layertap_wordpiece`. `capacity` is the size of `ids`. */
EXPORT void layertap_wordpiece_many(const tables *t, const special *around, const uint8_t *texts,
                                    const int64_t *sizes, int64_t num_texts, int64_t *ids, int64_t capacity,
                                    int64_t *counts)
{
    for (int64_t i = 0; i < num_texts; texts += sizes[i++]) {
        counts[i] = layertap_wordpiece(t, around, texts, sizes[i], ids, capacity);
        if (counts[i] > 0) {
            ids += counts[i];
            capacity -= counts[i];
        }
    }
}

/* Fills `slots`, which must be zeros, and `pieces` from a vocabulary whose pieces lie end to end in
   `characters`. */
EXPORT void layertap_wordpiece_build(const uint32_t *characters, const int64_t *lengths, const int64_t *ids,
                                     const uint8_t *continues, int64_t num_pieces, uint64_t *slots,
                                     int64_t log2_slots, uint32_t *pieces)
{
    uint64_t mask = (UINT64_C(1) << log2_slots) - 1;
    uint32_t used = 0;
    for (int64_t i = 0; i < num_pieces; characters += lengths[i++]) {
        uint64_t hash = first_hash(continues[i]);
        pieces[used] = (uint32_t)ids[i];
        pieces[used + 1] = (uint32_t)(2 * lengths[i] + continues[i]);
        for (int64_t j = 0; j < lengths[i]; j++) {
            pieces[used + 2 + j] = characters[j];
            hash = hashed(hash, characters[j]);
        }
        uint64_t at = hash >> (64 - log2_slots);
        while (slots[at]) at = (at + 1) & mask;
        slots[at] = (uint64_t)(uint32_t)hash << 32 | (used + 1);
        used += 2 + (uint32_t)lengths[i];
    }
}
