// Renders chat templates as Ollama does those that have .Messages: jobs in, one JSON object a line; texts out.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string
	Content string
}

type Job struct {
	Template string
	Messages []*Message
}

type Answer struct {
	Text  string
	Error string
}

func render(job Job) Answer {
	made, err := template.New("").Option("missingkey=zero").Parse(job.Template)
	if err != nil {
		return Answer{"", err.Error()}
	}
	system := ""
	for _, message := range job.Messages {
		if message.Role == "system" {
			system = message.Content
		}
	}
	var out strings.Builder
	values := map[string]any{"System": system, "Messages": job.Messages, "Response": ""}
	if err := made.Execute(&out, values); err != nil {
		return Answer{"", err.Error()}
	}
	return Answer{out.String(), ""}
}

func main() {
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	out := json.NewEncoder(os.Stdout)
	for {
		var job Job
		if in.Decode(&job) != nil {
			return
		}
		if out.Encode(render(job)) != nil {
			return
		}
	}
}
