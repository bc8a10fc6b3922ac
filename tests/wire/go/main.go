// Reads replies of EncodeService as a Go program would, with generated code, and says what they hold.
//
// Standard input: serialized messages, each after one byte, 'R' for an EncodeResponse or 'F' for an
// EncodeStreamResponse, and its length in four bytes, big-endian. Standard output: a JSON list with
// every tensor of every result: first those of the replies, then those of the streamed requests.
package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"sort"

	"google.golang.org/protobuf/proto"

	pb "layertap.example/wire/layertap/v1"
)

type tensor struct {
	Result string    `json:"result"`
	Name   string    `json:"name"`
	DType  int32     `json:"dtype"`
	Shape  []uint32  `json:"shape"`
	Scale  []float64 `json:"scale"`
	Data   []byte    `json:"data"`
}

// named are the tensors of a result in field order, which is how TensorChunk counts them.
func named(result *pb.EncodeResult) (names []string, tensors []*pb.Tensor) {
	add := func(name string, one *pb.Tensor) {
		if one != nil {
			names, tensors = append(names, name), append(tensors, one)
		}
	}
	add("last_hidden_state", result.LastHiddenState)
	add("pooler_output", result.PoolerOutput)
	add("hidden_states", result.HiddenStates)
	add("attentions", result.Attentions)
	for i, one := range result.Embeddings {
		add(fmt.Sprintf("embeddings.%d", i), one)
	}
	return names, tensors
}

func describe(where string, result *pb.EncodeResult) (found []tensor) {
	names, tensors := named(result)
	for i, one := range tensors {
		var scale []float64 // written in full, unlike a float32
		for _, value := range one.Scale {
			scale = append(scale, float64(value))
		}
		found = append(found, tensor{where, names[i], int32(one.Dtype), one.Shape, scale, one.Data})
	}
	if result.Tokens != nil {
		found = append(found, tensor{where, "tokens", 0, result.Tokens.Ids, nil, nil})
	}
	return found
}

type input struct {
	request uint64
	index   uint32
}

func main() {
	stdin := bufio.NewReader(os.Stdin)
	found := []tensor{}
	streamed := map[input]*pb.EncodeResult{}
	for replies := 0; ; {
		var head [5]byte
		if _, err := io.ReadFull(stdin, head[:]); err == io.EOF {
			break
		} else if err != nil {
			log.Fatal(err)
		}
		message := make([]byte, binary.BigEndian.Uint32(head[1:]))
		if _, err := io.ReadFull(stdin, message); err != nil {
			log.Fatal(err)
		}
		if head[0] == 'R' {
			var reply pb.EncodeResponse
			if err := proto.Unmarshal(message, &reply); err != nil {
				log.Fatal(err)
			}
			for i, result := range reply.Results {
				found = append(found, describe(fmt.Sprintf("reply %d.%d", replies, i), result)...)
			}
			replies++
			continue
		}
		var received pb.EncodeStreamResponse
		if err := proto.Unmarshal(message, &received); err != nil {
			log.Fatal(err)
		}
		frames := []*pb.EncodeStreamResponse{&received}
		if received.GetGrouped() != nil {
			frames = received.GetGrouped().Frames
		}
		for _, frame := range frames {
			switch {
			case frame.GetWhole() != nil:
				for i, result := range frame.GetWhole().Results {
					streamed[input{frame.RequestId, uint32(i)}] = result
				}
			case frame.GetHeader() != nil:
				streamed[input{frame.RequestId, frame.GetHeader().InputIndex}] = frame.GetHeader().Result
			case frame.GetChunk() != nil:
				chunk := frame.GetChunk()
				_, tensors := named(streamed[input{frame.RequestId, chunk.InputIndex}])
				one := tensors[chunk.Tensor]
				if chunk.Offset != uint64(len(one.Data)) {
					log.Fatalf("a chunk at %d, after %d bytes", chunk.Offset, len(one.Data))
				}
				one.Data = append(one.Data, chunk.Data...)
			case frame.GetEnd().GetStatus().GetCode() != 0:
				log.Fatal(frame.GetEnd().Status)
			}
		}
	}
	inputs := []input{}
	for one := range streamed {
		inputs = append(inputs, one)
	}
	sort.Slice(inputs, func(i, j int) bool {
		a, b := inputs[i], inputs[j]
		return a.request < b.request || a.request == b.request && a.index < b.index
	})
	for _, one := range inputs {
		found = append(found, describe(fmt.Sprintf("stream %d.%d", one.request, one.index), streamed[one])...)
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		log.Fatal(err)
	}
}
