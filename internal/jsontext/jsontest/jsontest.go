// Package jsontest compares hand-written JSON with encoding/json's. It owns the random
// values that it fills fields with, and must not know what the types mean.
package jsontest

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"avatarworker/internal/jsontext"
)

// Appender is a value that writes its own JSON.
type Appender interface {
	AppendJSON(b []byte) ([]byte, error)
}

// Compare fails the test unless v writes what encoding/json writes for it.
func Compare(t testing.TB, v Appender, escape jsontext.Escape) {
	t.Helper()
	var want bytes.Buffer
	e := json.NewEncoder(&want)
	e.SetEscapeHTML(bool(escape))
	wantErr := e.Encode(v)
	const before = "kept "
	got, err := v.AppendJSON([]byte(before))
	switch {
	case err != nil || wantErr != nil:
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%#v: error %v; encoding/json: %v", v, err, wantErr)
		}
	case string(got) != before+string(bytes.TrimSuffix(want.Bytes(), []byte("\n"))):
		t.Fatalf("%T writes\n%s\nencoding/json\n%s%s", v, got, before, want.Bytes())
	}
}

// texts are worth a try in every string.
var texts = []string{
	"", "a", "J-1_x", "<a href=\"x\">&amp;</a>", "back\\slash", "line\nbreak\ttab\x00\x1f\x7f", "ünïcödé 語 😀", "bad \xff\xc3 utf-8", "\u2028\u2029",
}

// Fill sets every field of the struct that v points to, at any depth, to random
// values. About a third of them stay zero.
func Fill(r *rand.Rand, v any) { fill(r, reflect.ValueOf(v).Elem()) }

func fill(r *rand.Rand, v reflect.Value) {
	if r.IntN(3) == 0 && v.Kind() != reflect.Struct {
		return
	}
	if at, ok := v.Addr().Interface().(*time.Time); ok {
		*at = someTime(r)
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(texts[r.IntN(len(texts))] + texts[r.IntN(len(texts))])
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(r.Uint64()) >> r.IntN(64)) // #nosec G115 -- any number
	case reflect.Uint64:
		v.SetUint(r.Uint64() >> r.IntN(64))
	case reflect.Uint8:
		v.SetUint(r.Uint64N(256))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(r, v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			fill(r, v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), r.IntN(3), 3))
		for i := range v.Len() {
			fill(r, v.Index(i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range r.IntN(3) {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(r, key)
			fill(r, value)
			v.SetMapIndex(key, value)
		}
	default:
		panic("a kind of field that is not filled: " + v.Type().String())
	}
}

// someTime is in UTC mostly, and now and then one that has no place in RFC 3339.
func someTime(r *rand.Rand) time.Time {
	switch r.IntN(12) {
	case 0:
		return time.Time{}
	case 1:
		return time.Date(10_000+r.IntN(9), 1, 1, 0, 0, 0, 0, time.UTC)
	case 2:
		return time.Unix(r.Int64N(4e9), 0).In(time.FixedZone("", r.IntN(48*3600)-24*3600))
	default:
		return time.Unix(r.Int64N(4e9), r.Int64N(1e9)/[]int64{1, 1000, 1_000_000}[r.IntN(3)]).UTC()
	}
}
